"""Stage 2: the trainer, what it runs on, what it leaves behind."""
