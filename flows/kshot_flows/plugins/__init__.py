"""What a plugin's author needs: a project to start from, and the conformance kit."""
