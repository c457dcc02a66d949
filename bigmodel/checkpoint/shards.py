def place(leaf, like): return leaf
