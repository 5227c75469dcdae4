"""The radix tree agrees with a dict of prefixes, page for page, in matching, locking and order of eviction."""

from support.radix_tree_machine import MACHINE_SETTINGS, RadixTreeMachine

TestRadixTree = RadixTreeMachine.TestCase
TestRadixTree.settings = MACHINE_SETTINGS
