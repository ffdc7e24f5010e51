"""Where a compression holds its tensors: beside the model, in host memory, or in scratch files."""
