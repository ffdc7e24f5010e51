"""Operations on a model: find and replace layers, attach PEFT adapters, and copy the model."""
