"""What is asked, and with what context?"""
