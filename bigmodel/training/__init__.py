"""Training, from a batch to an optimizer step: gradient scaling, optimizers, schedules, precision, and callbacks."""
