"""The building blocks that spread a model over ranks: layout, groups, collectives, layers. Imports
torch only."""
