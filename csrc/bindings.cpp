// The only file that sees pybind11. Raw pointers, sizes and streams come in as integers; no torch header is involved.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

// Instruction sets of this CPU among those that the kernels have paths for.
static std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back("avx512");
#endif
  return found;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of dalle_fast; reached through dalle_fast.ops.";
  m.attr("__version__") = DALLE_FAST_VERSION;
  m.attr("has_cuda") = static_cast<bool>(DALLE_FAST_HAS_CUDA);
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the kernels have paths for.");
}
