"""Choose the ranks of all layers under one budget: rules, candidates, the knapsack, and plans to review."""
