"""What is there: logit and tuned lens, logit attribution, probes, attention statistics, features."""
