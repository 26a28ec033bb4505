"""Chat templates that a recipe names (`data.chat_template`), for tokenizers that have none.

Each is a file, written here from the published format that it names in its first line.
`templates.json` has that source again, and the special tokens that the template writes around
turns. No torch.
"""
