"""The forms that are fastest on a CPU; each serves GPUs too, in their plain form."""
