"""Figures that others published of their models of a game, by the name of our figure that is closest to theirs.

They were measured on other levels, players and renderings of the game, so they say what is usual and no more.
GenieRedux is Kazemi et al. 2024 (arXiv 2409.06445), who measured Jafar (Willi et al. 2024) too; WorldGym (Quevedo et
al. 2025) is of policies for robots.
"""

from __future__ import annotations

PUBLISHED: dict[str, dict[str, str]] = {
    "coinrun": {
        "random_psnr_frames": "GenieRedux, guided: 38.31; Jafar: 12.66",
        "random_one_frame_psnr_frames": "GenieRedux, guided: 34.44",
        "autoencoder_psnr": "GenieRedux tokenizer: 38.25",
        "delta_psnr_4": "GenieRedux: 1.89",
        "closed_loop_pearson": "WorldGym: 0.78",
    }
}
"""Game -> figure -> what is published."""
