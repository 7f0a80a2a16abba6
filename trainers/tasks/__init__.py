"""Tasks: what each kind of model is trained for."""
