"""The network: families as tables, one transformer built from `parallel/` layers, Hugging Face in and out."""
