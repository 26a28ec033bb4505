"""The network: families as tables, one transformer built from `parallel/` layers, and Hugging Face
folders read and written."""
