"""Whatever is added, aborted, preempted and shared, each request generates what it would alone, and all of them end."""

from support.scheduler_machine import MACHINE_SETTINGS, SchedulerMachine

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = MACHINE_SETTINGS
