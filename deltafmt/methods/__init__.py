"""Methods: how to find a recipe for a tensor. What a recipe means is in `operators`."""
