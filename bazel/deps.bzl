"""Rule sets that Bazel itself loads, as forwarders to its native rules: no download is needed."""

_RULES = {
    "rules_cc": ("cc", [
        "cc_binary",
        "cc_import",
        "cc_library",
        "cc_proto_library",
        "cc_test",
        "cc_toolchain",
        "cc_toolchain_suite",
        "objc_library",
    ]),
    "rules_java": ("java", [
        "java_binary",
        "java_import",
        "java_library",
        "java_runtime",
        "java_test",
        "java_toolchain",
    ]),
    "rules_proto": ("proto", ["proto_lang_toolchain", "proto_library"]),
}

def _forwarding_rules_impl(repository):
    package, rules = _RULES[repository.name]
    repository.file(package + "/BUILD", 'exports_files(["defs.bzl"])\n')
    lines = ["{0} = native.{0}\n".format(rule) for rule in rules]
    repository.file(package + "/defs.bzl", "".join(lines))

_forwarding_rules = repository_rule(implementation = _forwarding_rules_impl, local = True)

def _no_coverage_tools_impl(repository):
    repository.file("nothing.sh", "#!/bin/sh\n", executable = True)
    tool = 'sh_binary(name = "{}", srcs = ["nothing.sh"], visibility = ["//visibility:public"])\n'
    tools = ["coverage_report_generator", "lcov_merger"]
    repository.file("BUILD", "".join([tool.format(name) for name in tools]))

_no_coverage_tools = repository_rule(implementation = _no_coverage_tools_impl, local = True)

def native_rules():
    """Declares the repositories that Bazel would otherwise download before its first build."""
    for name in _RULES:
        _forwarding_rules(name = name)
    _no_coverage_tools(name = "remote_coverage_tools")
