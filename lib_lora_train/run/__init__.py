"""A run from its settings to a LoRA file: plan, job, record, resume, saves."""
