"""What tests share: toy models, random problems, the literal formulas."""
