"""The judge: replays workloads from outside and says, per class, user and worker, whether the promise was kept."""
