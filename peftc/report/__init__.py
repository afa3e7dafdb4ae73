"""Pictures and pages of what the compiler did to a model."""
