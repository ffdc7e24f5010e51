"""Selection of the ranks of all layers under one budget: rules, candidates, the knapsack solver and plans."""
