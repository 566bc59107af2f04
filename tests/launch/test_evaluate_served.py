import tiny


def test_what_a_server_is_not_told_is_refused_before_it_is_asked(launch, config_file, tmp_path):
    config = config_file(tiny.experiment(policy={"strategy": "real_time_chunking"}))
    message = launch("evaluate_served", f"--config={config}", "--server=ws://127.0.0.1:9", f"--out={tmp_path}")
    assert message.startswith("error: config field 'policy.strategy' is 'real_time_chunking'")
