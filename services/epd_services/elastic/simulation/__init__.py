"""A discrete-event simulation of the pipeline, to try balancers on hours of load in seconds."""
