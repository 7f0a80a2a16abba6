"""Training: one loop, tasks and loss terms that register themselves, recipes, and the pipeline that walks them."""

from dreamenv.models import registry

registry.HOMES.extend(home for home in ("trainers.tasks", "trainers.terms") if home not in registry.HOMES)
