"""Sites: the places of a graph that a spec can name, one file a kind."""
