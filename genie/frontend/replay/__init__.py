"""Replay: a module's operations are captured once, under Dynamo's guards, and afterwards sent by number."""
