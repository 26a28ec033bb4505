"""How a model is spread over ranks: layout, groups, collectives and the layers built on them. Imports torch only."""
