"""Adapters of Hugging Face PEFT, in and out."""
