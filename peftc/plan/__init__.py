"""The Plan: a Spec against the sites of a model, decided and checked before a graph is touched."""
