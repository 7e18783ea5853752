"""Where the matrices of a model are decomposed: side by side on this machine, or by the workers of a Ray cluster."""
