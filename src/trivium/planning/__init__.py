"""What a recipe will take, before it is carried out: `trivium plan`."""
