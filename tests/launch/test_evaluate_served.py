import tiny
from serving import OtherServer


def test_what_a_server_is_not_told_is_refused_before_it_is_asked(launch, config_file, tmp_path):
    config = config_file(tiny.experiment(policy={"strategy": "real_time_chunking"}))
    message = launch("evaluate_served", f"--config={config}", "--server=ws://127.0.0.1:9", f"--out={tmp_path}")
    assert message.startswith("error: config field 'policy.strategy' is 'real_time_chunking'")


def test_a_server_that_tells_no_sizes_as_openpis_do_not(launch, config_file, tmp_path):
    config = config_file(tiny.experiment())
    with OtherServer({"policy": "pi0"}) as uri:
        message = launch("evaluate_served", f"--config={config}", f"--server={uri}", f"--out={tmp_path}")
    assert message.startswith("error: the server tells ['policy'] of its policy; expected ['images', 'action',")


def test_a_proxy_that_is_none(launch, config_file, tmp_path):
    arguments = (f"--config={config_file(tiny.experiment())}", "--server=ws://127.0.0.1:9", f"--out={tmp_path}", "--proxy=lab")
    assert (
        launch("evaluate_served", *arguments) == "error: 'lab' is not a proxy; expected http://HOST:PORT or socks5h://HOST:PORT"
    )
