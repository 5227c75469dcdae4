"""An engine that looks ahead gives every request what it gets alone in one that does not."""

from support.engine_machine import MACHINE_SETTINGS, EngineMachine

TestEngine = EngineMachine.TestCase
TestEngine.settings = MACHINE_SETTINGS
