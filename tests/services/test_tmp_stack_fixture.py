import httpx, os
def test_it(stack):
    assert httpx.get(stack.prefect_api_url + "/health", trust_env=False).is_success
    names=[d["name"] for d in httpx.post(stack.prefect_api_url + "/deployments/filter", json={}, trust_env=False).json()]
    assert names == ["train-and-ship"]
    assert str(stack.home) == os.environ["SHIP_HOME"]
    raise AssertionError("deliberate")
