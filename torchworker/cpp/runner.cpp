// Run an exported model without Python: requests on standard input, answers on standard output.
//
//   ship_runner torchscript|aoti FILE THREADS
//
// One frame after loading and one for each request. All numbers little-endian, as on every machine torch runs on:
//
//   tensor   u8 dtype, u8 dimensions, i64 sizes[dimensions], elements
//   request  u32 count, then count times: u8 length and that many bytes of name, tensor
//   answer   u8 1, u32 count and count tensors, or u8 0, u32 length and that many bytes of message
//
// It ends when standard input does, or with the process that started it.

#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

// The order is the protocol's: torchworker/runtimes/cpp_runner.py has the same.
const std::vector<at::ScalarType> kTypes = {
    at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kByte, at::kChar, at::kShort, at::kInt, at::kLong, at::kBool};
constexpr int kMaxDimensions = 16;
constexpr int64_t kMaxBytes = int64_t{1} << 36;

using Tensors = std::vector<at::Tensor>;

struct Request {
  std::vector<std::string> names;
  Tensors tensors;
};

bool read_exactly(int fd, void* into, size_t size) {
  auto* place = static_cast<char*>(into);
  while (size > 0) {
    const ssize_t got = ::read(fd, place, size);
    if (got <= 0) return false;
    place += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

void write_exactly(int fd, const void* from, size_t size) {
  const auto* place = static_cast<const char*>(from);
  while (size > 0) {
    const ssize_t put = ::write(fd, place, size);
    if (put <= 0) std::_Exit(3);
    place += put;
    size -= static_cast<size_t>(put);
  }
}

template <typename T>
T read_number(int fd) {
  T value;
  if (!read_exactly(fd, &value, sizeof value)) throw std::runtime_error("the request ends early");
  return value;
}

at::Tensor read_tensor(int fd) {
  const auto type = read_number<uint8_t>(fd);
  const auto dimensions = read_number<uint8_t>(fd);
  if (type >= kTypes.size() || dimensions > kMaxDimensions) throw std::runtime_error("not a tensor of this protocol");
  std::vector<int64_t> sizes(dimensions);
  int64_t elements = 1;
  for (auto& size : sizes) {
    size = read_number<int64_t>(fd);
    if (size < 0 || (size > 0 && elements > kMaxBytes / size)) throw std::runtime_error("a tensor too large to be one");
    elements *= size;
  }
  auto tensor = at::empty(sizes, kTypes[type]);
  if (!read_exactly(fd, tensor.data_ptr(), tensor.nbytes())) throw std::runtime_error("the request ends early");
  return tensor;
}

void read_request(int fd, uint32_t count, Request& into) {
  for (uint32_t index = 0; index < count; ++index) {
    std::string name(read_number<uint8_t>(fd), ' ');
    if (!read_exactly(fd, name.data(), name.size())) throw std::runtime_error("the request ends early");
    into.names.push_back(std::move(name));
    into.tensors.push_back(read_tensor(fd));
  }
}

void write_tensors(int fd, const Tensors& tensors) {
  const uint8_t fine = 1;
  write_exactly(fd, &fine, 1);
  const auto count = static_cast<uint32_t>(tensors.size());
  write_exactly(fd, &count, sizeof count);
  for (const auto& given : tensors) {
    const auto tensor = given.contiguous();
    uint8_t type = 0;
    while (type < kTypes.size() && kTypes[type] != tensor.scalar_type()) ++type;
    const auto dimensions = static_cast<uint8_t>(tensor.dim());
    write_exactly(fd, &type, 1);
    write_exactly(fd, &dimensions, 1);
    for (const int64_t size : tensor.sizes()) write_exactly(fd, &size, sizeof size);
    write_exactly(fd, tensor.data_ptr(), tensor.nbytes());
  }
}

void write_error(int fd, const std::string& message) {
  const uint8_t failed = 0;
  const auto length = static_cast<uint32_t>(message.size());
  write_exactly(fd, &failed, 1);
  write_exactly(fd, &length, sizeof length);
  write_exactly(fd, message.data(), message.size());
}

void flatten(const c10::IValue& value, Tensors& into) {
  if (value.isTensor()) {
    into.push_back(value.toTensor());
  } else if (value.isTuple()) {
    for (const auto& item : value.toTupleRef().elements()) flatten(item, into);
  } else if (value.isList()) {
    for (const auto& item : value.toListRef()) flatten(item, into);
  } else if (value.isGenericDict()) {
    for (const auto& item : value.toGenericDict()) flatten(item.value(), into);
  } else if (!value.isNone()) {
    throw std::runtime_error("an output is neither a tensor nor a tuple, list or dict of tensors");
  }
}

// By position, or by name where a parameter before the last is left out.
Tensors call_script(torch::jit::Module& module, const Request& request) {
  std::vector<std::string> parameters;
  for (const auto& argument : module.get_method("forward").function().getSchema().arguments()) {
    parameters.push_back(argument.name());
  }
  parameters.erase(parameters.begin());  // self
  const size_t given = request.names.size();
  const bool positional =
      parameters.size() == given ||
      (parameters.size() > given && std::equal(request.names.begin(), request.names.end(), parameters.begin()));
  std::vector<c10::IValue> arguments;
  std::unordered_map<std::string, c10::IValue> named;
  for (size_t index = 0; index < given; ++index) {
    if (positional) {
      arguments.emplace_back(request.tensors[index]);
    } else {
      named.emplace(request.names[index], request.tensors[index]);
    }
  }
  Tensors outputs;
  flatten(module.forward(std::move(arguments), named), outputs);
  return outputs;
}

std::function<Tensors(const Request&)> load(const std::string& kind, const std::string& file) {
  if (kind == "torchscript") {
    auto module = std::make_shared<torch::jit::Module>(torch::jit::load(file, at::kCPU));
    module->eval();
    return [module](const Request& request) { return call_script(*module, request); };
  }
  if (kind == "aoti") {
    auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(file);
    return [loader](const Request& request) { return loader->run(request.tensors); };
  }
  throw std::runtime_error("expected torchscript or aoti, got " + kind);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: ship_runner torchscript|aoti FILE THREADS\n";
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // What a model prints must not end up between answers.
  const int answers = dup(STDOUT_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);
  std::function<Tensors(const Request&)> model;
  try {
    at::set_num_threads(std::stoi(argv[3]));
    model = load(argv[1], argv[2]);
    write_tensors(answers, {});
  } catch (const std::exception& error) {
    write_error(answers, error.what());
    return 1;
  }
  const c10::InferenceMode inference;
  uint32_t count = 0;
  while (read_exactly(STDIN_FILENO, &count, sizeof count)) {
    Request request;
    try {
      read_request(STDIN_FILENO, count, request);
    } catch (const std::exception& error) {
      // The rest of the request cannot be found any more.
      write_error(answers, error.what());
      return 1;
    }
    try {
      write_tensors(answers, model(request));
    } catch (const std::exception& error) {
      write_error(answers, error.what());
    }
  }
  return 0;
}
