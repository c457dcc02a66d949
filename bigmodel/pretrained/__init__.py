"""Public weights in Hugging Face's formats, read as data only."""
