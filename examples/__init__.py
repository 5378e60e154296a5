"""Small models and their data, written as a user of Lightning would write them."""
