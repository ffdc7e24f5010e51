"""Forms that modules with several matrices have while their matrices are layers of their own."""
