// The only file that sees pybind11. Raw pointers, sizes and streams come in as integers; no torch header is involved.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

#ifndef DALLE_FAST_HAS_CPU  // tests build the CUDA part alone
#define DALLE_FAST_HAS_CPU 1
#endif
#if DALLE_FAST_HAS_CPU
#include "cpu/engine.h"
#include "cpu/ops.h"
#endif

namespace py = pybind11;
using dalle_fast::DType;
using dalle_fast::Epilogue;

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static void expect(const char* what, size_t got, size_t expected) {
  if (got != expected)
    throw std::invalid_argument("got " + std::to_string(got) + " " + what + ", expected " + std::to_string(expected));
}

#if DALLE_FAST_HAS_CUDA
// The CUDA kernels. Python checks shapes and types; addresses are of tensors on the device, streams are integers.

static DType float_type(const std::string& name) {
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "float32") return DType::float32;
  throw std::invalid_argument("got type " + name + ", expected bfloat16, float16 or float32");
}

static void cuda_decode_attention(const std::vector<uintptr_t>& t, const std::vector<int32_t>& n, float scale,
                                  const std::string& dtype, bool dependent_launch, uintptr_t stream) {
  expect("tensors", t.size(), 16);
  expect("sizes", n.size(), 14);
  dalle_fast::CudaDecodeParams c{};
  c.call = {at<const void>(t[0]), at<const void>(t[1]), at<const void>(t[2]), at<const void>(t[3]), at<const void>(t[4]),
            at<void>(t[5]), at<void>(t[6]), at<void>(t[7]), at<const int64_t>(t[8]), at<const int32_t>(t[9]),
            at<const int32_t>(t[10]), at<const int32_t>(t[11]), n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], scale,
            float_type(dtype)};
  c.partial = at<float>(t[12]), c.arrived = at<int32_t>(t[13]), c.rows = n[9], c.splits = n[10];
  c.candidate_stride = n[11], c.head_stride = n[12], c.cell_stride = n[13];
  c.scale_k = at<const float>(t[14]), c.scale_v = at<const float>(t[15]);
  c.dependent_launch = dependent_launch;
  dalle_fast::launch_decode_attention(c, at<void>(stream));
}

static void cuda_sample(const std::vector<uintptr_t>& t, const std::vector<int32_t>& n, float temperature, double top_p,
                        float guidance_scale, uint64_t seed, const std::string& dtype, bool dependent_launch,
                        uintptr_t stream) {
  expect("tensors", t.size(), 10);
  expect("sizes", n.size(), 8);
  dalle_fast::CudaSampleParams c{};
  c.call = {at<const void>(t[0]), at<const int64_t>(t[1]), at<const int64_t>(t[2]), at<int64_t>(t[3]), n[0], n[1], n[2],
            temperature, static_cast<float>(top_p), seed, float_type(dtype)};
  c.given = at<const int64_t>(t[4]), c.log_p = at<double>(t[5]), c.x = at<void>(t[6]);
  c.table = at<const void>(t[7]), c.rows = at<const void>(t[8]), c.columns = at<const void>(t[9]);
  c.dim = n[3], c.height = n[4], c.width = n[5], c.first_cell = n[6], c.first_place = n[7];
  c.top_p = top_p, c.guidance_scale = guidance_scale, c.dependent_launch = dependent_launch;
  dalle_fast::launch_sample(c, at<void>(stream));
}

static Epilogue epilogue_named(const std::string& name) {
  return name == "geglu" ? Epilogue::geglu
         : name == "gelu" ? Epilogue::gelu_erf
         : name == "gelu_tanh" ? Epilogue::gelu_tanh
                               : Epilogue::none;
}

static dalle_fast::CudaLinearParams cuda_linear(const std::vector<int32_t>& n, const std::string& epilogue,
                                                const std::string& dtype, const std::string& weight_dtype) {
  expect("sizes", n.size(), 6);
  dalle_fast::CudaLinearParams c{};
  c.linear.rows = n[0], c.linear.inputs = n[1], c.linear.outputs = n[2], c.parts = n[3];
  c.multiprocessors = n[4], c.shared_limit = n[5];
  c.linear.epilogue = epilogue_named(epilogue), c.linear.dtype = float_type(dtype);
  c.weight_dtype = weight_dtype == "int8" ? DType::int8 : weight_dtype == "int4" ? DType::int4 : c.linear.dtype;
  return c;
}

// Bytes; `normed` says whether there will be a LayerNorm.
static size_t cuda_skinny_linear_workspace(const std::vector<int32_t>& n, bool normed, const std::string& epilogue,
                                           const std::string& dtype, const std::string& weight_dtype) {
  static const float some = 1;
  dalle_fast::CudaLinearParams c = cuda_linear(n, epilogue, dtype, weight_dtype);
  c.linear.norm_weight = normed ? &some : nullptr;
  return dalle_fast::skinny_linear_workspace(c);
}

static void cuda_skinny_linear(const std::vector<uintptr_t>& t, const std::vector<int32_t>& n, float norm_eps,
                               const std::string& epilogue, const std::string& dtype, const std::string& weight_dtype,
                               bool dependent_launch, uintptr_t stream) {
  expect("tensors", t.size(), 14);
  dalle_fast::CudaLinearParams c = cuda_linear(n, epilogue, dtype, weight_dtype);
  c.linear.x = at<const void>(t[0]), c.linear.weight = at<const void>(t[1]), c.linear.bias = at<const float>(t[2]);
  c.linear.residual = at<const void>(t[3]), c.linear.norm_weight = at<const float>(t[4]);
  c.linear.norm_bias = at<const float>(t[5]), c.linear.y = at<void>(t[6]), c.linear.norm_eps = norm_eps;
  c.scale = at<const float>(t[7]), c.counters = at<int32_t>(t[8]), c.workspace = at<void>(t[9]);
  c.branch = at<const void>(t[10]), c.branch_weight = at<const float>(t[11]), c.branch_bias = at<const float>(t[12]);
  c.sum = at<void>(t[13]);
  c.dependent_launch = dependent_launch;
  dalle_fast::launch_skinny_linear(c, at<void>(stream));
}

static void cuda_join(const std::vector<uintptr_t>& t, int32_t rows, int32_t inputs, float norm_eps, const std::string& dtype,
                      bool dependent_launch, uintptr_t stream) {
  expect("tensors", t.size(), 8);
  dalle_fast::CudaLinearParams c{};
  c.linear.rows = rows, c.linear.inputs = inputs, c.linear.norm_eps = norm_eps, c.linear.dtype = float_type(dtype);
  c.linear.x = at<const void>(t[0]), c.linear.norm_weight = at<const float>(t[1]), c.linear.norm_bias = at<const float>(t[2]);
  c.linear.y = at<void>(t[3]), c.branch = at<const void>(t[4]), c.branch_weight = at<const float>(t[5]);
  c.branch_bias = at<const float>(t[6]), c.sum = at<void>(t[7]), c.dependent_launch = dependent_launch;
  dalle_fast::launch_join(c, at<void>(stream));
}

static void register_cuda(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("skinny_linear", &cuda_skinny_linear, release());
  m.def("skinny_linear_workspace", &cuda_skinny_linear_workspace);
  m.def("join", &cuda_join, release());
  m.def("decode_attention", &cuda_decode_attention, release());
  m.def("sample", &cuda_sample, release());
}
#endif

#if DALLE_FAST_HAS_CPU

// The CPU kernels. Python checks shapes and types, and keeps every tensor alive during the call.
namespace cpu = dalle_fast::cpu;

static std::vector<float> floats(uintptr_t address, size_t count) {
  return address ? std::vector<float>(at<const float>(address), at<const float>(address) + count)
                 : std::vector<float>();
}

static std::vector<int32_t> ints(uintptr_t address, size_t count) {
  return std::vector<int32_t>(at<const int32_t>(address), at<const int32_t>(address) + count);
}

static std::unique_ptr<cpu::PackedLinear> pack(const py::dict& w, int threads) {
  const cpu::WeightSource source{w["source_dtype"].cast<DType>(),
                                 at<const void>(w["data"].cast<uintptr_t>()),
                                 at<const float>(w["scale"].cast<uintptr_t>()),
                                 at<const float>(w["bias"].cast<uintptr_t>()),
                                 at<const float>(w["output_scale"].cast<uintptr_t>()),
                                 w["rows"].cast<int>(),
                                 w["inputs"].cast<int>(),
                                 w["geglu"].cast<bool>()};
  const DType type = w["dtype"].cast<DType>();
  py::gil_scoped_release release;
  return std::make_unique<cpu::PackedLinear>(type, source, threads);
}

static cpu::EngineShape engine_shape(const py::dict& d) {
  cpu::EngineShape s{};
#define DF_FIELD(name) s.name = d[#name].cast<decltype(s.name)>()
  DF_FIELD(dim), DF_FIELD(hidden), DF_FIELD(heads), DF_FIELD(head_dim), DF_FIELD(text_len), DF_FIELD(height),
      DF_FIELD(width);
  DF_FIELD(image_vocab), DF_FIELD(first_cell), DF_FIELD(first_place), DF_FIELD(rotary_dim), DF_FIELD(final_norms);
  DF_FIELD(sandwich_norm), DF_FIELD(token_shift), DF_FIELD(reversible), DF_FIELD(activation), DF_FIELD(norm_eps),
      DF_FIELD(cache), DF_FIELD(chunk);
#undef DF_FIELD
  return s;
}

static cpu::Norm norm(const py::object& pair, size_t dim) {  // (address of weight, address of bias) or None
  if (pair.is_none()) return {};
  const auto [weight, bias] = pair.cast<std::pair<uintptr_t, uintptr_t>>();
  return {floats(weight, dim), floats(bias, dim)};
}

static void add_layer(cpu::Engine& engine, const py::dict& d, int threads) {
  const size_t dim = static_cast<size_t>(engine.shape().dim), cells = static_cast<size_t>(engine.cells());
  cpu::LayerWeights layer;
  layer.attention_norm = norm(d["attention_norm"], dim), layer.mlp_norm = norm(d["mlp_norm"], dim);
  layer.attention_norm_out = norm(d["attention_norm_out"], dim), layer.mlp_norm_out = norm(d["mlp_norm_out"], dim);
  layer.qkv = pack(d["qkv"].cast<py::dict>(), threads), layer.out = pack(d["out"].cast<py::dict>(), threads);
  layer.up = pack(d["up"].cast<py::dict>(), threads), layer.down = pack(d["down"].cast<py::dict>(), threads);
  cpu::TailTables& t = layer.tail;
  t.slots = d["slots"].cast<int>(), t.max_neighbours = d["max_neighbours"].cast<int>();
  t.slot_of_cell = ints(d["slot_of_cell"].cast<uintptr_t>(), cells);
  t.neighbour_slots = ints(d["neighbour_slots"].cast<uintptr_t>(), cells * static_cast<size_t>(t.max_neighbours));
  t.neighbour_count = ints(d["neighbour_count"].cast<uintptr_t>(), cells);
  engine.add_layer(std::move(layer));
}

static void set_embedding(cpu::Engine& engine, DType type, uintptr_t tokens, uintptr_t rows, uintptr_t columns) {
  const cpu::EngineShape& s = engine.shape();
  const size_t dim = static_cast<size_t>(s.dim), bytes = s.image_vocab * dim * (type == DType::bfloat16 ? 2 : 4);
  cpu::ImageEmbedding e{type, cpu::Buffer(bytes), floats(rows, s.height * dim), floats(columns, s.width * dim)};
  std::memcpy(e.tokens.as<void>(), at<const void>(tokens), bytes);
  engine.set_embedding(std::move(e));
}

static void decode_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t prefix_k, uintptr_t prefix_v,
                             uintptr_t tail_k, uintptr_t tail_v, uintptr_t out, int64_t position,
                             uintptr_t slot_of_cell, uintptr_t neighbour_slots, uintptr_t neighbour_count,
                             const std::vector<int32_t>& sizes, float scale, DType dtype, int threads) {
  expect("sizes", sizes.size(), 9);
  const dalle_fast::DecodeAttentionParams p{at<const void>(q),
                                            at<const void>(k),
                                            at<const void>(v),
                                            at<const void>(prefix_k),
                                            at<const void>(prefix_v),
                                            at<void>(tail_k),
                                            at<void>(tail_v),
                                            at<void>(out),
                                            &position,
                                            at<const int32_t>(slot_of_cell),
                                            at<const int32_t>(neighbour_slots),
                                            at<const int32_t>(neighbour_count),
                                            sizes[0],
                                            sizes[1],
                                            sizes[2],
                                            sizes[3],
                                            sizes[4],
                                            sizes[5],
                                            sizes[6],
                                            sizes[7],
                                            sizes[8],
                                            scale,
                                            dtype};
  cpu::decode_attention(p, threads);
}

static void sparse_attention(const std::vector<uintptr_t>& t, const std::vector<int64_t>& strides,
                             const std::vector<int32_t>& n, float scale, DType dtype, int threads) {
  expect("tensors", t.size(), 7);
  expect("strides", strides.size(), 6);
  expect("sizes", n.size(), 6);
  cpu::sparse_attention({at<const void>(t[0]), at<const void>(t[1]), at<const void>(t[2]),
                         {strides[0], strides[1], strides[2]}, {strides[3], strides[4], strides[5]},
                         at<void>(t[3]), at<float>(t[4]), at<const int32_t>(t[5]), at<const int32_t>(t[6]),
                         n[0], n[1], n[2], n[3], n[4], n[5], scale, dtype}, threads);
}

static void sample(uintptr_t logits, uintptr_t candidates, int64_t position, uintptr_t tokens, int batch, int vocab,
                   int top_k, float temperature, float top_p, uint64_t seed, int threads) {
  cpu::sample({at<const void>(logits), at<const int64_t>(candidates), &position, at<int64_t>(tokens), batch, vocab,
               top_k, temperature, top_p, seed, DType::float32},
              threads);
}

static void skinny_linear(uintptr_t x, const cpu::PackedLinear& weight, uintptr_t residual, uintptr_t norm_weight,
                          uintptr_t norm_bias, uintptr_t y, int rows, float norm_eps, Epilogue epilogue, int threads) {
  cpu::skinny_linear({at<const void>(x), nullptr, nullptr, at<const void>(residual), at<const float>(norm_weight),
                      at<const float>(norm_bias), at<void>(y), rows, weight.view().inputs, weight.view().outputs,
                      norm_eps, epilogue, weight.view().type},
                     weight, threads);
}

static void register_cpu(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "isa", [] { return std::string(cpu::kernels().name); },
      "The instruction set in use; DALLE_FAST_CPU_ISA forces one.");
  m.def("pool", [] { return std::string(cpu::pool_name()); }, "Whose threads are used: openmp (torch's) or own.");
  py::enum_<DType>(m, "DType")
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("int8", DType::int8)
      .value("int4", DType::int4);
  py::enum_<Epilogue>(m, "Epilogue")
      .value("none", Epilogue::none)
      .value("gelu_tanh", Epilogue::gelu_tanh)
      .value("gelu", Epilogue::gelu_erf)
      .value("geglu", Epilogue::geglu);
  py::class_<cpu::PackedLinear>(m, "PackedLinear")
      .def(py::init(&pack), py::arg("weight"), py::arg("threads"))
      .def_property_readonly("nbytes", &cpu::PackedLinear::bytes);
  py::class_<cpu::Engine>(m, "Engine")
      .def(py::init([](const py::dict& shape, uintptr_t angles, size_t count) {
             return std::make_unique<cpu::Engine>(engine_shape(shape), floats(angles, count));
           }),
           py::arg("shape"), py::arg("angles"), py::arg("count"))
      .def("add_layer", &add_layer)
      .def("set_embedding", &set_embedding)
      .def("set_head",
           [](cpu::Engine& engine, const std::vector<std::pair<uintptr_t, uintptr_t>>& norms, const py::dict& head,
              int threads) {
             std::vector<cpu::Norm> all;
             const size_t dim = static_cast<size_t>(engine.shape().dim);
             for (const auto& [weight, bias] : norms) all.push_back({floats(weight, dim), floats(bias, dim)});
             engine.set_head(std::move(all), pack(head, threads));
           })
      .def(
          "prefill",
          [](cpu::Engine& engine, uintptr_t x, uintptr_t start, int prompts, int candidates, int threads,
             uintptr_t logits) {
            engine.prefill(at<const float>(x), at<const float>(start), prompts, candidates, threads, at<float>(logits));
          },
          release())
      .def(
          "feed",
          [](cpu::Engine& engine, uintptr_t tokens, int count, int threads, uintptr_t logits) {
            engine.feed(at<const int64_t>(tokens), count, threads, at<float>(logits));
          },
          release())
      .def(
          "sample",
          [](cpu::Engine& engine, uintptr_t tokens, uintptr_t candidates, uintptr_t given, int count, float temperature,
             int top_k, float top_p, float guidance_scale, uint64_t seed, int threads, uintptr_t logits,
             uintptr_t drawn, uintptr_t log_p) {
            engine.sample(at<const int64_t>(tokens),
                          {at<const int64_t>(candidates), at<const int64_t>(given), count, temperature, top_p,
                           guidance_scale, top_k, seed, at<int64_t>(drawn), at<double>(log_p)},
                          threads, at<float>(logits));
          },
          release())
      .def("fork", &cpu::Engine::fork, release())
      .def_property_readonly("batch", &cpu::Engine::batch)
      .def_property_readonly("position", &cpu::Engine::position)
      .def_property_readonly("weight_bytes", &cpu::Engine::weight_bytes)
      .def_property_readonly("cache_bytes", &cpu::Engine::cache_bytes);
  m.def("sparse_attention", &sparse_attention, release());
  m.def("decode_attention", &decode_attention, release());
  m.def("sample", &sample, release());
  m.def("skinny_linear", &skinny_linear, release());
}

#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of dalle_fast; reached through dalle_fast.ops.";
  m.attr("__version__") = DALLE_FAST_VERSION;
  m.attr("has_cuda") = static_cast<bool>(DALLE_FAST_HAS_CUDA);
#if DALLE_FAST_HAS_CPU
  register_cpu(m.def_submodule("cpu", "The CPU kernels; reached through dalle_fast.ops and dalle_fast.cpu_engine."));
#endif
#if DALLE_FAST_HAS_CUDA
  register_cuda(m.def_submodule("cuda", "The CUDA kernels; reached through dalle_fast.ops."));
#endif
}
