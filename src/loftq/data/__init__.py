"""From a data set to what a model is trained on: rows with their place, examples of token ids and loss masks, batches."""
