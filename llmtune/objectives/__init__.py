"""Objectives: functions from a model record and a batch to sums of loss and weight."""
