// Sends image files to an inference service and prints what it finds: inspect SERVER SITE IMAGE...

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "feddymem/v1/inspection.grpc.pb.h"

namespace v1 = feddymem::v1;

// Round all addresses of the target; again if the service is away or busy for a moment.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "feddymem.v1.InspectionService"}],
    "retryPolicy": {
      "maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "5s", "backoffMultiplier": 4,
      "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"]
    }
  }]
})";
constexpr int kLargestMessage = 256 << 20;
constexpr std::chrono::seconds kTimeout(30);

std::unique_ptr<v1::InspectionService::Stub> Connect(const std::string& server) {
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(kServiceConfig);
  arguments.SetMaxReceiveMessageSize(kLargestMessage);
  // A request that is larger than this buffer is not sent again; it has 256 KiB by default.
  arguments.SetInt(GRPC_ARG_PER_RPC_RETRY_BUFFER_SIZE, kLargestMessage);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  return v1::InspectionService::NewStub(
      grpc::CreateCustomChannel(server, grpc::InsecureChannelCredentials(), arguments));
}

const char* Name(v1::Verdict verdict) {
  if (verdict == v1::VERDICT_ANOMALOUS) return "anomalous";
  return verdict == v1::VERDICT_NORMAL ? "normal" : "unjudged";  // of a release without a calibration
}

bool Inspect(v1::InspectionService::Stub& stub, const std::string& path, const std::string& site) {
  std::ifstream file(path, std::ios::binary);
  v1::InspectRequest request;
  request.set_encoded(std::string(std::istreambuf_iterator<char>(file), {}));
  request.set_site(site);

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kTimeout);
  v1::InspectResponse response;
  const grpc::Status status = stub.Inspect(&context, request, &response);
  if (!status.ok()) {
    std::cerr << path << ": " << status.error_message() << " (status " << status.error_code() << ")\n";
    return false;
  }
  std::cout << path << ": score " << response.score() << ", " << Name(response.verdict()) << ", release "
            << response.release() << "\n";
  if (response.has_guarantee()) {
    std::cout << "  p " << response.p_value() << "; of normal images on average " << response.guarantee().false_alarm_rate()
              << " are anomalous, by " << response.guarantee().images() << " of them\n";
  }
  return true;
}

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: inspect SERVER SITE IMAGE...\n";
    return 2;
  }
  const auto stub = Connect(arguments[1]);
  bool all = true;
  for (int i = 3; i < count; ++i) all = Inspect(*stub, arguments[i], arguments[2]) && all;
  return all ? 0 : 1;
}
