"""What runs when: plans, trainings, jobs."""
