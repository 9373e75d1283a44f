"""Workers that were taken over: what an attacker's code can try inside one, on a real bus.

`zygote.py` stands in for kbusd's zygote in the bus of the tests, and nowhere else: nothing in kbusd/ looks
for it. `attacks.py` is the attacker's code; it runs in a worker that has locked itself down.
"""
