"""On-disk episode shards: see `writer` for the format, `reader` for access, `windows` for training samples."""

from dreamenv.data.reader import Dataset, Shard
from dreamenv.data.windows import HELD_OUT_FROM, Windows, split_levels
from dreamenv.data.writer import DatasetWriter

__all__ = ["HELD_OUT_FROM", "Dataset", "DatasetWriter", "Shard", "Windows", "split_levels"]
