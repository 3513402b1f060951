// Sends image files to an inference service and prints what it finds: dotnet run -- SERVER SITE IMAGE...

using System;
using System.IO;
using System.Threading.Tasks;
using Feddymem.V1;
using Google.Protobuf;
using Grpc.Core;
using Grpc.Net.Client;
using Grpc.Net.Client.Configuration;

public static class Program
{
    private const int LargestMessage = 256 << 20;
    private static readonly TimeSpan Timeout = TimeSpan.FromSeconds(30);

    public static async Task<int> Main(string[] arguments)
    {
        if (arguments.Length < 3)
        {
            Console.Error.WriteLine("usage: inspect SERVER SITE IMAGE...");
            return 2;
        }
        using (var channel = Connect(arguments[0]))
        {
            var client = new InspectionService.InspectionServiceClient(channel);
            var all = true;
            for (var i = 2; i < arguments.Length; i++)
            {
                all &= await Inspect(client, arguments[i], arguments[1]);
            }
            return all ? 0 : 1;
        }
    }

    // SERVER is http://HOST:PORT, or dns:///NAME:PORT to go round all addresses of a name.
    private static GrpcChannel Connect(string server)
    {
        var again = new RetryPolicy
        {
            MaxAttempts = 5,
            InitialBackoff = TimeSpan.FromSeconds(0.1),
            MaxBackoff = TimeSpan.FromSeconds(5),
            BackoffMultiplier = 4,
            RetryableStatusCodes = { StatusCode.Unavailable, StatusCode.ResourceExhausted, StatusCode.Cancelled },
        };
        var method = new MethodConfig { Names = { MethodName.Default }, RetryPolicy = again };
        return GrpcChannel.ForAddress(server, new GrpcChannelOptions
        {
            Credentials = ChannelCredentials.Insecure,
            ServiceConfig = new ServiceConfig
            {
                MethodConfigs = { method },
                LoadBalancingConfigs = { new RoundRobinConfig() },
            },
            MaxReceiveMessageSize = LargestMessage,
            // A request that is larger than these is not sent again; one has 1 MiB by default.
            MaxRetryBufferPerCallSize = LargestMessage,
            MaxRetryBufferSize = LargestMessage,
        });
    }

    private static async Task<bool> Inspect(
        InspectionService.InspectionServiceClient client, string path, string site)
    {
        var request = new InspectRequest
        {
            Encoded = ByteString.CopyFrom(File.ReadAllBytes(path)),
            Site = site,
        };
        try
        {
            var response = await client.InspectAsync(request, deadline: DateTime.UtcNow + Timeout);
            var verdict = response.Verdict switch
            {
                Verdict.Anomalous => "anomalous",
                Verdict.Normal => "normal",
                _ => "unjudged", // of a release without a calibration
            };
            Console.WriteLine($"{path}: score {response.Score}, {verdict}, release {response.Release}");
            if (response.Guarantee != null)
            {
                var known = response.Guarantee;
                Console.WriteLine(
                    $"  p {response.PValue}; of normal images on average {known.FalseAlarmRate} are anomalous, by {known.Images} of them");
            }
            return true;
        }
        catch (RpcException error)
        {
            Console.Error.WriteLine($"{path}: {error.Status.Detail} (status {error.StatusCode})");
            return false;
        }
    }
}
