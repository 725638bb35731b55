"""What runs when: plans, their tuning (walk), trainings, jobs and processes; packed results; what a plan costs."""
