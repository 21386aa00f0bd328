"""What only PyTorch's insides can tell or do; each function has a contract in ``tests/test_torch_*.py``.

The contracts were seen on torch 2.13. A release that breaks one breaks its test, and nothing else needs to be searched:
``tests/test_torch_private_use.py`` refuses uses elsewhere.
"""
