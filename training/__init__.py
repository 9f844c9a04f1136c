"""Train, measure and tune routers: a labelled dataset in, a bundle out."""
