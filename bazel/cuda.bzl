"""cuda_library: a cc_library of CUDA sources. nvcc compiles, the C++ toolchain archives and links."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")

def _cuda_library_impl(ctx):
    toolchain = find_cpp_toolchain(ctx)
    features = cc_common.configure_features(
        ctx = ctx,
        cc_toolchain = toolchain,
        requested_features = ctx.features,
        unsupported_features = ctx.disabled_features,
    )
    own = CcInfo(
        compilation_context = cc_common.create_compilation_context(headers = depset(ctx.files.hdrs)),
    )
    info = cc_common.merge_cc_infos(cc_infos = [own] + [dep[CcInfo] for dep in ctx.attr.deps])
    context = info.compilation_context
    includes = depset(transitive = [context.includes, context.system_includes])

    # Those of this repository. A change in the toolkit's compiles everything again.
    own_headers = [file for file in context.headers.to_list() if not file.owner.workspace_name]
    headers = ctx.actions.declare_file(ctx.label.name + "_headers.txt")
    ctx.actions.write(headers, "".join([file.path + "\n" for file in own_headers]))

    nvcc = [file for file in ctx.files._compiler if file.basename == "nvcc"]
    relocatable = bool(ctx.files.device_libraries)
    common = ctx.actions.args()
    common.add(toolchain.compiler_executable, format = "-ccbin=%s")
    common.add_all(["-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC"])
    objects = []
    for source in ctx.files.srcs:
        object = ctx.actions.declare_file("{}_objects/{}.o".format(ctx.label.name, source.short_path))
        unused = ctx.actions.declare_file("{}.unused".format(object.basename), sibling = object)
        first = ctx.actions.args()
        first.add_all([headers, unused] + nvcc)
        arguments = ctx.actions.args()
        arguments.add_all(["-std=c++17"] + (["-rdc=true"] if relocatable else []))
        arguments.add_all(ctx.attr.copts)
        arguments.add_all(includes, before_each = "-I")
        arguments.add("-c", source)
        arguments.add("-o", object)
        ctx.actions.run(
            executable = ctx.executable._compile,
            arguments = [first, common, arguments],
            inputs = depset([source, headers], transitive = [context.headers]),
            tools = depset(ctx.files._compiler, transitive = [toolchain.all_files]),
            outputs = [object, unused],
            unused_inputs_list = unused,
            mnemonic = "CudaCompile",
            progress_message = "Compiling " + source.short_path,
            use_default_shell_env = True,
        )
        objects.append(object)

    if relocatable:
        # Once, with all device code that these sources call. Nothing here needs the device runtime.
        linked = ctx.actions.declare_file("{}_objects/device_link.o".format(ctx.label.name))
        arguments = ctx.actions.args()
        arguments.add_all(["-dlink", "-cudadevrt=none", "-o", linked])
        arguments.add_all(includes, before_each = "-I")
        arguments.add_all(objects + ctx.files.device_libraries)
        ctx.actions.run(
            executable = nvcc[0],
            arguments = [common, arguments],
            inputs = depset(objects + ctx.files.device_libraries, transitive = [context.headers]),
            tools = depset(ctx.files._compiler, transitive = [toolchain.all_files]),
            outputs = [linked],
            mnemonic = "CudaDeviceLink",
            progress_message = "Linking device code of {}".format(ctx.label),
            use_default_shell_env = True,
        )
        objects.append(linked)

    linking_context, _ = cc_common.create_linking_context_from_compilation_outputs(
        name = ctx.label.name,
        actions = ctx.actions,
        feature_configuration = features,
        cc_toolchain = toolchain,
        compilation_outputs = cc_common.create_compilation_outputs(pic_objects = depset(objects)),
        linking_contexts = [info.linking_context],
        disallow_dynamic_library = True,
    )
    return [
        DefaultInfo(files = depset(objects)),
        CcInfo(compilation_context = context, linking_context = linking_context),
    ]

cuda_library = rule(
    doc = "CUDA sources for sm_90a, position independent. Without relocatable device code, unless they " +
          "call libraries of it.",
    implementation = _cuda_library_impl,
    attrs = {
        "copts": attr.string_list(doc = "Options for nvcc."),
        "deps": attr.label_list(doc = "Libraries whose headers are used.", providers = [CcInfo]),
        "device_libraries": attr.label_list(
            doc = "Archives of relocatable device code to link these sources with. Their host code is " +
                  "for deps.",
            allow_files = [".a"],
        ),
        "hdrs": attr.label_list(doc = "Headers of these sources.", allow_files = [".cuh", ".h"]),
        "srcs": attr.label_list(doc = "Sources, one object each.", allow_files = [".cu"]),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
        "_compile": attr.label(
            default = "//bazel:compile_cuda.sh",
            allow_single_file = True,
            cfg = "exec",
            executable = True,
        ),
        "_compiler": attr.label(default = "@cuda_env//:compiler"),
    },
    fragments = ["cpp"],
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)
