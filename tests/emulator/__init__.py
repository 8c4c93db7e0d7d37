"""The emulator's own tests: nothing of fastlm but fastlm.emulator."""
